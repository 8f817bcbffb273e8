//! The steps of the pipeline, one file each.

/// A step as a global subprogram of each family: verified by itself, with a stack of its own. It takes the packet if it
/// uses it (the verifier asks for every argument), its key and entry, and numbers.
macro_rules! subprograms {
    ($(#[$doc:meta])+ $name:ident: $needs:path =>
        $step:ident($($skb:ident)?; $($arg:ident: $ty:ty),*) as $v4:ident, $v6:ident) => {
        $(#[$doc])+
        pub(crate) trait $name: $needs {
            fn $step(
                $($skb: &$crate::ctx::tc::Skb,)?
                key: &proxy_common::abi::FlowKey<Self>,
                found: &mut proxy_common::abi::Flow<Self>,
                $($arg: $ty),*
            ) -> proxy_common::Outcome;
        }

        subprograms!(@family proxy_common::V4, $name, $step($($skb)?; $($arg: $ty),*), $v4);
        subprograms!(@family proxy_common::V6, $name, $step($($skb)?; $($arg: $ty),*), $v6);
    };
    (@family $family:ty, $name:ident, $step:ident($($skb:ident)?; $($arg:ident: $ty:ty),*), $symbol:ident) => {
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $symbol(
            $($skb: *mut aya_ebpf::bindings::__sk_buff,)?
            key: *const proxy_common::abi::FlowKey<$family>,
            found: *mut proxy_common::abi::Flow<$family>,
            $($arg: u32),*
        ) -> u32 {
            if key.is_null() || found.is_null() {
                return proxy_common::Outcome::DropHelper as u32;
            }
            // SAFETY: not null, and the verifier checks the caller's memory against the types' sizes.
            let (key, found) = unsafe { (&*key, &mut *found) };
            let outcome = $step::<$family>(
                $(&$crate::ctx::tc::Skb::new($skb),)?
                key,
                found,
                $(<$ty as $crate::step::Argument>::from_number($arg)),*
            );
            outcome as u32
        }

        impl $name for $family {
            #[inline(always)]
            fn $step(
                $($skb: &$crate::ctx::tc::Skb,)?
                key: &proxy_common::abi::FlowKey<Self>,
                found: &mut proxy_common::abi::Flow<Self>,
                $($arg: $ty),*
            ) -> proxy_common::Outcome {
                let code = $symbol($($skb.as_ptr(),)? key, found, $($crate::step::Argument::number($arg)),*);
                proxy_common::Outcome::from_code(code).unwrap_or(proxy_common::Outcome::DropHelper)
            }
        }
    };
}

/// What a subprogram takes beside pointers.
pub(crate) trait Argument: Copy {
    fn number(self) -> u32;
    fn from_number(number: u32) -> Self;
}

impl Argument for u32 {
    #[inline(always)]
    fn number(self) -> u32 {
        self
    }

    #[inline(always)]
    fn from_number(number: u32) -> Self {
        number
    }
}

impl Argument for bool {
    #[inline(always)]
    fn number(self) -> u32 {
        self.into()
    }

    #[inline(always)]
    fn from_number(number: u32) -> Self {
        number != 0
    }
}

pub(crate) mod affinity;
pub(crate) mod attempt;
pub(crate) mod checksum;
pub(crate) mod choose;
pub(crate) mod confirm;
pub(crate) mod direct;
pub(crate) mod flow;
pub(crate) mod forward;
pub(crate) mod fragment;
pub(crate) mod icmp;
pub(crate) mod mark;
pub(crate) mod masquerade;
pub(crate) mod reject;
pub(crate) mod reserve;
pub(crate) mod resolve;
pub(crate) mod rewrite;
pub(crate) mod route;
pub(crate) mod sctp;
pub(crate) mod service;
