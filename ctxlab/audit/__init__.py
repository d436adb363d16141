"""The evidence: each claim of the report, measured and judged."""

from .. import _face

_HOMES = {  # name -> the module that defines it
    "Account": "trials",
    "Bench": "trials",
    "Claim": "trials",
    "Finding": "trials",
    "LEDGER": "claims",
    "Number": "trials",
    "Trial": "trials",
    "Verdict": "trials",
    "account": "trials",
    "audit": "trials",
    "gain_claim": "trials",
    "saving_claim": "trials",
    "write_report": "report",
}
__all__ = [*_HOMES]
__getattr__, __dir__ = _face(__name__, _HOMES)
