"""The version of quantlab, also available when run from a checkout that is not installed."""

VERSION = "0.1.0"
