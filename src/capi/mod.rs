//! The C ABI: arguments are checked, converted and passed on, errors become numbers and text, a panic stops here.
//! Nothing else happens in this module. The only place of the crate with `extern "C"` functions.
//!
//! The header `include/qcow2.h` is generated from these files (`build.rs` under the feature `header`), in the order of
//! its sections; the comments on everything public here are the manual that a C programmer reads, so they speak C.
//! What must not change once released: names, parameters, numbers, and the layout of every struct, which may only
//! grow at its end.

#![allow(non_camel_case_types)]
#![allow(
    clippy::missing_safety_doc,
    reason = "the comments are the C manual, and say of every call what its pointers must be"
)]

mod arguments;
mod boundary;
mod structs;

pub mod bitmap;
pub mod check;
pub mod create;
pub mod error;
pub mod facts;
pub mod image;
pub mod io;
pub mod map;
pub mod opts;
pub mod queue;
pub mod resize;
pub mod snapshot;
pub mod storage;
pub mod version;
