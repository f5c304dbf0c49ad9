from .auditing import audit as audit
from .resolve import folder_at_hand as folder_at_hand
from .resolve import folder_of as folder_of
from .resolve import is_remote as is_remote
from .server.serve import serve as serve
