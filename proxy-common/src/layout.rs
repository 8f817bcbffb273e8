//! Compile-time proof of a map struct's layout.

/// Defines a `repr(C)` struct of stated size whose fields leave no hole.
///
/// The kernel compares map keys as bytes, and the verifier refuses to copy uninitialised padding, so a hole is a bug
/// that shows only at run time. Here it does not compile:
///
/// ```compile_fail
/// proxy_common::abi_struct! {
///     /// u8 followed by u32: three bytes of hole.
///     pub struct Holed: 8 { a: u8, b: u32 }
/// }
/// ```
#[macro_export]
macro_rules! abi_struct {
    ($(#[$meta:meta])* pub struct $name:ident : $size:literal {
        $($(#[$fmeta:meta])* $field:ident : $ty:ty),+ $(,)?
    }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty),+ }

        const _: () = {
            assert!(size_of::<$name>() == $size, concat!(stringify!($name), ": size differs from the stated one"));
            assert!(0 $(+ size_of::<$ty>())+ == $size, concat!(stringify!($name), ": hidden padding"));
            assert!(align_of::<$name>() <= 8, concat!(stringify!($name), ": maps align values to 8 bytes at most"));
        };
    };
    ($(#[$meta:meta])* pub struct $name:ident<F> : V4 = $size4:literal, V6 = $size6:literal {
        $($(#[$fmeta:meta])* $field:ident : $ty:ty),+ $(,)?
    }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name<F: $crate::Family> { $($(#[$fmeta])* pub $field: $ty),+ }

        const _: () = {
            const fn sum<F: $crate::Family>() -> usize { 0 $(+ size_of::<$ty>())+ }
            assert!(size_of::<$name<$crate::V4>>() == $size4, concat!(stringify!($name), "<V4>: size differs"));
            assert!(size_of::<$name<$crate::V6>>() == $size6, concat!(stringify!($name), "<V6>: size differs"));
            assert!(sum::<$crate::V4>() == $size4, concat!(stringify!($name), "<V4>: hidden padding"));
            assert!(sum::<$crate::V6>() == $size6, concat!(stringify!($name), "<V6>: hidden padding"));
            assert!(align_of::<$name<$crate::V6>>() <= 8, concat!(stringify!($name), ": alignment over 8"));
        };
    };
}
