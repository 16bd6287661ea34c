"""PostgreSQL: tables, queries, migrations. The only place with SQLAlchemy, psycopg and pgvector.

It knows no rules but those that a race decides.
"""
