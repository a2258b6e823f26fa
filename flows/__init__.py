"""Chains of tasks that a person schedules and watches. No science here."""
