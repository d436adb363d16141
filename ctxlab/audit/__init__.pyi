"What `__init__.py` loads at its first use, for type checkers."

from ctxlab.audit import changes as changes
from ctxlab.audit import claims as claims
from ctxlab.audit import growth as growth
from ctxlab.audit import ladder as ladder
from ctxlab.audit import original as original
from ctxlab.audit import peers as peers
from ctxlab.audit import report as report
from ctxlab.audit import rust as rust
from ctxlab.audit import trials as trials
from ctxlab.audit.claims import LEDGER as LEDGER
from ctxlab.audit.report import write_report as write_report
from ctxlab.audit.trials import Account as Account
from ctxlab.audit.trials import Bench as Bench
from ctxlab.audit.trials import Claim as Claim
from ctxlab.audit.trials import Finding as Finding
from ctxlab.audit.trials import Number as Number
from ctxlab.audit.trials import Trial as Trial
from ctxlab.audit.trials import Verdict as Verdict
from ctxlab.audit.trials import account as account
from ctxlab.audit.trials import audit as audit
from ctxlab.audit.trials import gain_claim as gain_claim
from ctxlab.audit.trials import saving_claim as saving_claim
