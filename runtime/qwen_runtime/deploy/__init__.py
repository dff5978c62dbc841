"""Bundles on other projects' serving platforms; each module needs the platform it is named for."""
