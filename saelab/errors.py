"""The errors saelab raises beside `ValueError`: each message names the value, what was expected, and the fix."""


class SaelabError(Exception):
    """Base of everything saelab raises on purpose that is not a bad argument value."""


class ModelError(SaelabError):
    """A language model could not be fetched, read or run."""


class CacheError(SaelabError):
    """An activation cache is damaged, foreign, or does not fit."""


class TrainingError(SaelabError):
    """Training stopped: NaN or infinite activations, or a run folder that cannot be continued."""


class StoreError(SaelabError):
    """A feature store is missing, damaged, or belongs to another SAE."""
