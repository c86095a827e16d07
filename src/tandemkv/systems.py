"""Ways to attend to a long context, by name: compositions of our own parts, for comparisons. Names and numbers only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """selector: of `tandemkv.select`, or None where every token is attended.

    verified: epsilon and delta, where what is left out is estimated with a promise. lanes: that far tokens may take
    part by, on a device and a host with links between them; none where one processor reaches near and far.
    stages_heads: a prompt's far tokens come up one KV head after the other. joins_logits: those of far tokens join
    those of near ones in one softmax, and what the lane has time for raises the budget. where_it_differs: from what the
    paper has, said beside its results.
    """

    about: str
    selector: str | None = None
    verified: tuple[float, float] | None = None
    lanes: tuple[str, ...] = ()
    stages_heads: bool = False
    joins_logits: bool = False
    where_it_differs: str = ""


SYSTEMS: dict[str, System] = {
    "dense": System("every token is attended"),
    "window": System(
        "the first tokens and the most recent ones",
        selector="window",
    ),
    "streaming_llm": System(
        "StreamingLLM (2309.17453): the first 4 tokens and the most recent ones",
        selector="window",
        where_it_differs="positions stay those of the text, the paper renumbers them inside its cache",
    ),
    "h2o": System(
        "H2O (2306.14048): what got the most attention so far, and the most recent; the rest is gone",
        selector="heavy_hitters",
        where_it_differs="blocks of 16 tokens; of a prompt the last 64 queries of each chunk are watched, and what a "
        "later prompt reads is not yet gone for its own queries",
    ),
    "keyformer": System(
        "Keyformer (2403.09054): H2O with Gumbel noise and a temperature that rises from 1 to 2",
        selector="keyformer",
        where_it_differs="as H2O here; the noise is added to the logarithm of a block's mass, not to a token's logit",
    ),
    "quest": System(
        "Quest (2406.10774): the blocks whose channel minima and maxima allow the largest product",
        selector="bounds",
        where_it_differs="bounds are int8, a group of query heads shares a choice, the first two layers are sparse too",
    ),
    "infinigen": System(
        "InfiniGen (2406.19707): the query of a layer is predicted from the input of the layer before it",
        selector="lookahead",
        where_it_differs="a budget instead of a threshold; partial keys are principal directions found in the keys at "
        "hand, not columns of a skewed W_q; nothing is prefetched where the near device is the CPU",
    ),
    "retroinfer": System(
        "RetroInfer (2505.02922): the nearest clusters of keys exactly, of the others centroids with their counts",
        selector="clusters",
        where_it_differs="blocks of 16 tokens are clustered, not tokens; no buffer of hot clusters",
    ),
    "corm": System(
        "CORM (2404.15949): what one of the last queries gave more than its even share; the rest is gone",
        selector="recall",
        where_it_differs="blocks of 16 tokens, and a budget; as H2O here in prompts",
    ),
    "hgca": System(
        "HGCA (2507.03153): what weighed more than its head's mean while it was near; nothing is deleted",
        selector="salience",
        lanes=("attend",),
        where_it_differs="blocks of 16 tokens, and a budget that cuts the set of a head",
    ),
    "flexgen": System(
        "FlexGen (2303.06865): all far tokens come over the link, and the device attends",
        lanes=("stream",),
        where_it_differs="decoding alone: no blocks of batches, weights stay on the device",
    ),
    "moe-lightning": System(
        "MoE-Lightning (2411.11217): the host attends to all far tokens; queries go down, results come up",
        lanes=("attend",),
        where_it_differs="the attention of decoding alone, as HybridGen compares with it",
    ),
    "kvpr": System(
        "KVPR (2411.17089): K and V of the first tokens are rebuilt from layer inputs, the others' come over the link",
        lanes=("recompute", "stream"),
        where_it_differs="inputs come up in pieces, of which the first is rebuilt while the next is on its way; near "
        "memory for inputs is taken from that for K and V",
    ),
    "hybridgen": System(
        "HybridGen (2604.18529): the host computes logits with a query foreseen a layer ahead, and picks; logits and V "
        "come up, and join those of near tokens in one softmax; spare time raises the budget",
        selector="logits",
        lanes=("logits",),
        joins_logits=True,
        where_it_differs="blocks of 16 tokens are picked by the mass of their logits in this step, not by what "
        "accumulated; the device foresees the query and sends it down; the first two layers ask with the true one; "
        "step, period and return of Algorithm 1 are ours",
    ),
    "headinfer": System(
        "HeadInfer (2502.12574): all far tokens come over the link, those of a prompt one KV head after the other",
        lanes=("stream",),
        stages_heads=True,
        where_it_differs="the newest tokens of all heads stay near",
    ),
    "tandem": System(
        "every way at once, split by measurement: the host attends, or computes logits; K and V come over the link, or "
        "are rebuilt",
        lanes=("recompute", "attend", "logits", "stream"),
    ),
    "tandem-sparse": System(
        "the blocks whose best key is best along the directions in which a head's keys differ most; of the others the "
        "means of clusters with their counts",
        selector="tandem",
    ),
    "tandem-verified": System(
        "the same blocks, and of the others a sample so large that the error of a layer's attention is "
        "above 5 % with a probability of at most 5 %",
        selector="columns",
        verified=(0.05, 0.05),
    ),
}

EVALUATED = tuple(name for name, system in SYSTEMS.items() if name == "dense" or system.selector is not None)
"""Those whose answers are their own: the others attend to every token, and answer as dense attention does."""
