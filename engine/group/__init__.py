"""Several engine processes that serve one model together: one leads, the others follow its every call, and all end as one."""
