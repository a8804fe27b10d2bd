//! libqcow2: the qcow2 engine that every hypervisor and image tool can link.
//!
//! The way of a write, one direction, each stage a value:
//! ```text
//! capi                check arguments, convert, call, map the error; the panic boundary
//! image::write        the pipeline, readable as its stages:
//!   plan::split         guest range            -> pieces that stay inside one L2 slice
//!   inflight.claim      piece                  -> guard; overlapping allocating writes wait here
//!   tables lookup       piece                  -> ClusterState { host, alloc bits, zero bits }
//!   plan::plan_write    ClusterState + range   -> WritePlan { in place | new, what to copy, next bits, what to free }
//!   alloc reserve       clusters               -> Reservation (dropping it gives the clusters back)
//!   storage             copy + payload in one vectored write -> Written
//!   tables link         Reservation + Written  -> the new entry becomes visible; the old cluster is freed later
//! ```
//! Imports run one way: `capi -> queue -> image -> {alloc, check, codec} -> tables -> {plan, storage}`;
//! `plan -> format`.
//! `error`, `few` and `wait` are leaves. `docs/design.md` is the long form of this page.

pub mod alloc;
pub mod bitmap;
#[cfg(feature = "capi")]
pub mod capi;
pub mod check;
pub mod codec;
pub mod error;
pub mod few;
pub mod format;
pub mod image;
pub mod plan;
pub mod queue;
pub mod storage;
pub mod tables;
pub mod wait;

pub use error::{Error, Result};
pub use image::{CreateOptions, Image, OpenOptions};
