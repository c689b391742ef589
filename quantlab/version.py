"""The version of quantlab, known also where it is run from a checkout that is not installed."""

VERSION = "0.1.0"
