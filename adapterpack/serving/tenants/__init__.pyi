from .keys import EVERYBODY as EVERYBODY
from .keys import Key as Key
from .keys import Keys as Keys
from .keys import new_key as new_key
from .limits import ServerLimits as ServerLimits
from .quotas import Quotas as Quotas
