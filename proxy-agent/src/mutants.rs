//! One fault at a time, for the test that the tests notice it (`tests/tests/mutants.rs`). Only under the feature `mutants`,
//! which nothing that is shipped has: without it `mutant!` is a constant.

/// Names the fault.
#[cfg(feature = "mutants")]
const VARIABLE: &str = "FAIRLEAD_MUTANT";

/// True if this build has faults to choose from.
pub const AVAILABLE: bool = cfg!(feature = "mutants");

/// True where the line that decides a rule is to do the opposite.
macro_rules! mutant {
    ($name:literal) => {
        $crate::mutants::is($name)
    };
}

/// True if this is the fault that was chosen.
#[cfg(feature = "mutants")]
pub(crate) fn is(name: &str) -> bool {
    static CHOSEN: std::sync::LazyLock<Option<String>> = std::sync::LazyLock::new(|| std::env::var(VARIABLE).ok());
    CHOSEN.as_deref() == Some(name)
}

/// True if this is the fault that was chosen: none ever is.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub(crate) const fn is(_: &str) -> bool {
    false
}
