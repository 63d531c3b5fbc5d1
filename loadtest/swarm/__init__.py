"""What `locustfile.py` needs that knows no locust: answers, shapes, traces, people, figures, the report's page."""
