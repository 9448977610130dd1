"""Auditing: what is wrong with what trains, found after a backward.

What lives here: the codes, what they are found from, one check a code, the report, and the callback. How data passes
through:

    model + optimizer + gradients -> Evidence -> checks, one a code -> Finding -> AuditReport -> table, HTML, audit.json
"""

from .audit import audit
from .callback import AuditCallback
from .findings import AuditReport, Finding

__all__ = ["AuditCallback", "AuditReport", "Finding", "audit"]
