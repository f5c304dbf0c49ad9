from .auditing import audit as audit
from .resolve import folder_of as folder_of
from .server.serve import serve as serve
