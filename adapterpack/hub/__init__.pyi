from .auditing import audit as audit
from .server.serve import serve as serve
