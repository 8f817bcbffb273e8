//! The steps of the pipeline, one file each.

pub(crate) mod attempt;
pub(crate) mod checksum;
pub(crate) mod confirm;
pub(crate) mod direct;
pub(crate) mod flow;
pub(crate) mod forward;
pub(crate) mod reject;
pub(crate) mod reserve;
pub(crate) mod resolve;
pub(crate) mod rewrite;
pub(crate) mod route;
pub(crate) mod service;
