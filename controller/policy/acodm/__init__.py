"""AC-ODM: online data mixing by an actor-critic."""
