//! The programs of devices without an Ethernet header: loaded when the first such device comes, and tried again where that
//! fails.

use std::time::Instant;

use super::super::attempts::Attempts;
use super::{Common, FLAT, FLAT_OBJECT, LoadError, Stubs, create_maps, load_programs, stubs, switch};

/// Their stubs, once they are needed.
#[derive(Debug, Default)]
pub(super) struct Flat {
    stubs: Option<Stubs>,
    attempts: Attempts,
}

impl Flat {
    /// The stubs, loaded if that was not tried a short time ago.
    pub(super) fn stubs(&mut self, common: &Common) -> Result<&mut Stubs, LoadError> {
        let stubs = match self.stubs.take() {
            Some(stubs) => stubs,
            None if self.attempts.due(Instant::now()) => load(common).map_err(|error| {
                let why = error.to_string();
                if self.attempts.failed(Instant::now(), &why) {
                    tracing::error!(
                        error = why,
                        "the programs for devices without an Ethernet header do not load; they are tried again, at least every \
                         five minutes"
                    );
                }
                LoadError::Flat
            })?,
            None => return Err(LoadError::Flat),
        };
        Ok(self.stubs.insert(stubs))
    }
}

fn load(common: &Common) -> Result<Stubs, LoadError> {
    let began = Instant::now();
    let mut ebpf = create_maps(FLAT_OBJECT, common)?;
    load_programs(&mut ebpf)?;
    switch(&mut ebpf, &FLAT, &common.pins)?;
    let took_ms = began.elapsed().as_millis() as u64;
    tracing::info!(took_ms, "programs loaded for devices without an Ethernet header");
    stubs(&FLAT, &common.pins)
}
