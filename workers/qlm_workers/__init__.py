"""One instance: a Celery worker that hosts engines and leases work for them."""
