"""The `fairlane` command and what it needs: embedded servers, the process stack, the demo, the audit."""
