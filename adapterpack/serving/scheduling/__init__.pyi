from .admission import Admission as Admission
from .engine_thread import EngineStopped as EngineStopped
from .engine_thread import EngineThread as EngineThread
from .rows import RequestOutput as RequestOutput
from .rows import ScheduledRow as ScheduledRow
from .rows import SequenceOutput as SequenceOutput
