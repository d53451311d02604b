"""From scored records to figures with intervals, tables and pages."""
