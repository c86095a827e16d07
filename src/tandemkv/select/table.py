"""Selectors by name, as they are where nothing else is asked for."""

from tandemkv.select.base import Selector
from tandemkv.select.bounds import Bounds
from tandemkv.select.clusters import Clusters
from tandemkv.select.columns import Columns
from tandemkv.select.heavy_hitters import HeavyHitters
from tandemkv.select.keyformer import Keyformer
from tandemkv.select.logits import Logits
from tandemkv.select.lookahead import Lookahead
from tandemkv.select.recall import Recall
from tandemkv.select.salience import Salience
from tandemkv.select.tandem import Tandem
from tandemkv.select.window import Window

SELECTORS: dict[str, Selector] = {
    "window": Window(),
    "salience": Salience(),
    "heavy_hitters": HeavyHitters(),
    "keyformer": Keyformer(),
    "bounds": Bounds(),
    "columns": Columns(),
    "recall": Recall(),
    "clusters": Clusters(),
    "lookahead": Lookahead(),
    "logits": Logits(),
    "tandem": Tandem(),
}
