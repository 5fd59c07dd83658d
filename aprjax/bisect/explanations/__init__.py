"""What happened to a tensor: a search for the everyday accident that turns the reference's values into the model's."""

from aprjax.bisect.explanations.evidence import Diagnosis, Explanation
from aprjax.bisect.explanations.pair import Pair
from aprjax.bisect.explanations.search import HYPOTHESES, explain

__all__ = ["HYPOTHESES", "Diagnosis", "Explanation", "Pair", "explain"]
