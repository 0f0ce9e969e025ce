"""The errors saelab raises besides `ValueError`: each message names the value, what was expected, and the fix."""


class SaelabError(Exception):
    """Base of all errors that saelab raises deliberately, except those for bad argument values."""


class ModelError(SaelabError):
    """A language model could not be fetched, read or run."""


class CacheError(SaelabError):
    """An activation cache is damaged, not a saelab cache, or does not match the call."""


class TrainingError(SaelabError):
    """Training failed: non-finite numbers, too little memory, a lost rank, or a folder that holds another run."""


class StoreError(SaelabError):
    """A feature store is missing, damaged, or belongs to another SAE."""
