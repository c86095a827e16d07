"""Ways to attend to a long context, by name: compositions of our own parts, for comparisons. Names and numbers only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """selector: of `tandemkv.select`, or None where every token is attended.

    where_it_differs: from what the paper has, said beside its results.
    """

    about: str
    selector: str | None = None
    where_it_differs: str = ""


SYSTEMS: dict[str, System] = {
    "dense": System("every token is attended"),
    "window": System(
        "StreamingLLM (2309.17453): the first tokens and the most recent ones",
        selector="window",
        where_it_differs="positions stay those of the text, the paper renumbers them inside its cache",
    ),
}
