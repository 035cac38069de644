"""The error tree. The class of an error is the decision that the caller has to take.

PerpcastError
├── SetupError                      the user puts something right, then runs the command again (exit code 2)
│   ├── ConfigError                 a key, a type or a value in the configuration
│   ├── DatabaseUnavailableError    no server, wrong password, port taken, schema of another version
│   ├── ExchangeUnavailableError    no connection to the exchange after all retries
│   └── MissingInputError           an earlier stage has not run: no candles, no dataset, no model
├── ExchangeError                   an answer of the exchange
│   ├── TemporaryExchangeError      try again later (rate limit, overload, reset, time-out of a read)
│   ├── RefusedError                the exchange said no; the same request will be refused again
│   └── UnknownOutcomeError         bytes may have arrived: reconcile, never assume, never resend
└── DataError                       data that cannot be what it claims to be

Every message says what was wrong, what was expected, what was received, and what to do next.
"""


class PerpcastError(Exception):
    """Any foreseeable failure; the command ends with `exit_code` and the message, without a traceback."""

    exit_code = 1


class SetupError(PerpcastError):
    """Something that the user has to put right before the command can run."""

    exit_code = 2


class ConfigError(SetupError):
    """The configuration holds an unknown key, a wrong type or a value that cannot be."""


class DatabaseUnavailableError(SetupError):
    """No usable PostgreSQL: nothing listens, another program holds the port, the password is refused."""


class ExchangeUnavailableError(SetupError):
    """The exchange cannot be reached, after all retries."""


class MissingInputError(SetupError):
    """What an earlier stage makes is not there yet."""


class ExchangeError(PerpcastError):
    """An answer of the exchange that is not the one asked for."""


class TemporaryExchangeError(ExchangeError):
    """Worth another try: rate limit, overload, reset connection, time-out of a read.

    `retry_after_seconds` is what the exchange asked to wait, None where it said nothing.
    """

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class RefusedError(ExchangeError):
    """The exchange understood the request and said no; `code` is its retCode."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class UnknownOutcomeError(ExchangeError):
    """A write whose bytes may have arrived: only evidence from the exchange settles it."""


class DataError(PerpcastError):
    """Data that cannot be what it claims to be: a damaged file, a row that breaks its own rules."""
