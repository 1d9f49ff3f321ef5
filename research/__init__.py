"""Programs behind the findings: models of our own, and tests of why models differ."""
