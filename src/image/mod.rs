//! The handle: an open image, and what is done with it.

pub mod create;
pub mod info;
pub mod load;
pub mod options;

pub use create::{create, create_with};
pub use info::Info;
pub use load::load_header;
pub use options::{
    BackingFormat, BackingPolicy, CreateOptions, LogLevel, Logger, MissingFormat, OpenOptions, Resolver,
};
