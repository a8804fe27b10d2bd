//! The handle: an open image, and what is done with it.

pub mod load;
pub mod options;

pub use load::load_header;
pub use options::{
    BackingFormat, BackingPolicy, CreateOptions, LogLevel, Logger, MissingFormat, OpenOptions, Resolver,
};
