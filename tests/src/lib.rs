//! Fairlead's test tiers and their shared tools.
