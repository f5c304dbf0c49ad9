"""What people read: tables, plots, one self-contained HTML file."""
