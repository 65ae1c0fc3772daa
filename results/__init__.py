"""What is made of an evaluation: tables, exports, figures."""
