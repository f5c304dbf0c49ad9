from .decoder_graph import CACHE_LENGTHS as CACHE_LENGTHS
from .decoder_graph import DECODER as DECODER
from .decoder_graph import LOGITS_POSITIONS as LOGITS_POSITIONS
from .decoder_graph import LONGEST as LONGEST
from .decoder_graph import SOURCE_LENGTHS as SOURCE_LENGTHS
from .decoder_graph import graphs_of as graphs_of
from .decoder_graph import without_decoder as without_decoder
from .files import adapter_files as adapter_files
from .files import find_other_files as find_other_files
from .files import has_other_tokenizer as has_other_tokenizer
from .files import require_files as require_files
from .layer_caches import empty_caches as empty_caches
from .layer_caches import growing_axis as growing_axis
from .layer_caches import replaced_states as replaced_states
from .manifest import ADAPTER_IDS as ADAPTER_IDS
from .manifest import ADAPTER_POSITIONS as ADAPTER_POSITIONS
from .manifest import ADDED as ADDED
from .manifest import ENCODED as ENCODED
from .manifest import GRAPH as GRAPH
from .manifest import PAST as PAST
from .manifest import PRESENT as PRESENT
from .manifest import Bundle as Bundle
from .manifest import BundledAdapter as BundledAdapter
from .manifest import Heads as Heads
from .manifest import MappedSite as MappedSite
from .manifest import bundle_in as bundle_in
from .manifest import graph_file as graph_file
from .manifest import manifest_bytes as manifest_bytes
from .manifest import parse_bundle as parse_bundle
from .manifest import read_bundle as read_bundle
from .proofs import VerificationCache as VerificationCache
from .reports import PROOFS as PROOFS
from .signature import GraphSignature as GraphSignature
from .signature import Port as Port
from .signature import signature_of as signature_of

FILE_NAME: str
GENAI_FILE: str
