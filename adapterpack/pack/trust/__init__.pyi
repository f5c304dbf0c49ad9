from .keyless import SigstoreIdentity as SigstoreIdentity
from .keyless import SigstoreSigner as SigstoreSigner
from .sign import Signable as Signable
from .sign import Signers as Signers
from .sign import seal as seal
from .sign import unseal as unseal
from .statement import Statement as Statement
