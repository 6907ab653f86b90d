"""The schema's descriptions in Chinese; one that is missing here is shown in English."""

CHINESE: dict[str, str] = {}
