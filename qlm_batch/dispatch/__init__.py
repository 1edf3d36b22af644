"""Hints to workers, over Celery."""
