//! One fault at a time, for the test that the tests notice it (`tests/tests/mutants.rs`). Only under the feature `mutants`:
//! without it `mutant!` is a constant, and nothing of this is in the object.

/// Number of the fault, which the loader stores before it loads: to the verifier it is a constant.
#[cfg(feature = "mutants")]
#[unsafe(no_mangle)]
pub static MUTANT: u32 = 0;

/// True where the line that decides a rule is to do the opposite.
#[macro_export]
macro_rules! mutant {
    ($name:literal) => {
        cfg!(feature = "mutants") && $crate::mutants::is(const { proxy_common::mutant::id($name) })
    };
}

/// True if this is the fault that was chosen.
#[cfg(feature = "mutants")]
#[inline(always)]
pub fn is(id: u32) -> bool {
    // SAFETY: a static; volatile, because its value is not the one that is compiled in.
    unsafe { (&raw const MUTANT).read_volatile() == id }
}

/// True if this is the fault that was chosen: none ever is.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn is(_: u32) -> bool {
    false
}
