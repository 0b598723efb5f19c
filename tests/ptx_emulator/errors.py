"""What can be wrong with a program."""


class EmulationError(Exception):
    """The emulated code did something that it must not."""


class UnknownInstructionError(EmulationError):
    """The emulator does not know it."""


class MemoryAccessError(EmulationError):
    """Outside of every allocation, or not aligned."""


class UninitialisedError(EmulationError):
    """A register or shared memory was read before anything was written to it."""


class BarrierError(EmulationError):
    """Not all threads came to the same barrier or shuffle."""


class RaceError(EmulationError):
    """Two threads touched the same byte, one of them writing, with nothing to order them."""
