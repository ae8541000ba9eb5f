"""Every error a user can cause, and nothing else.

    MotetError
    ├── ConfigError        a setting is missing, unknown or out of range
    ├── DataError          pairs cannot be read, or cannot be dealt
    ├── BackboneError      a language model cannot be found, opened or used
    ├── JudgeError         a judge is missing, fails, knows too much, or is given too little to say anything
    ├── RunError           a run folder is missing, unfinished, foreign or in use
    └── MessageError       what came from a client or a server is not what was agreed

The command line prints the sentence and exits with 2; a traceback needs ``--debug``.
"""


class MotetError(Exception):
    """Something that the caller can put right; the message says how."""


class ConfigError(MotetError, ValueError):
    """A setting is missing, unknown or out of range."""


class DataError(MotetError, ValueError):
    """Preference pairs cannot be read, or cannot be dealt to the clients as asked."""


class BackboneError(MotetError, RuntimeError):
    """A language model cannot be found, opened or used."""


class JudgeError(MotetError, RuntimeError):
    """A judge is missing, fails, was trained on what it judges, or is given too few prompts to say anything."""


class RunError(MotetError, RuntimeError):
    """A run folder is missing, unfinished, damaged, or belongs to another run."""


class MessageError(MotetError, ValueError):
    """A message does not hold what was agreed: names, shapes or versions differ."""
