"""Completion events on their way out: signed webhooks and e-mail."""
