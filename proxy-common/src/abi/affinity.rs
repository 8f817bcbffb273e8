//! `AFFINITY_V4/6`: which endpoint a client was given, where the Service asks for `sessionAffinity: ClientIP`.

use crate::abi_struct;

abi_struct! {
    /// Key of `AFFINITY_V4/6`: all addresses of a Service port share it (rule 78).
    pub struct AffinityKey<F>: V4 = 8, V6 = 20 {
        /// The client, before its source is exchanged (rule 83).
        client: F::Addr,
        /// The Service port.
        port_id: u32,
    }
}

abi_struct! {
    /// Value of `AFFINITY_V4/6`.
    pub struct Affinity: 16 {
        /// The endpoint, index into `LIVE`.
        endpoint_id: u32,
        /// `LIVE`'s generation when the endpoint was chosen: one that comes back has lost its clients (rule 81).
        endpoint_gen: u32,
        /// Its place in the run when it was found last; where it stands now is looked for if it is not there.
        index: u32,
        /// Last new connection, seconds: the timeout begins with each (rule 79).
        last_new_secs: u32,
    }
}
