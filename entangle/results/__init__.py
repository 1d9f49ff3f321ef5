"""What was measured: frames with a manifest. Read, compared and drawn without torch."""
