//! Telling the caller how far a long call has come, and letting the caller end it.

use std::cell::Cell;

use crate::error::{Error, Result};

/// Called with how much is done and how much there is in all; `false` ends the call ([`Error::Cancelled`]).
pub type ProgressFn<'a> = &'a dyn Fn(u64, u64) -> bool;

/// How far a call has come.
pub struct Progress<'a> {
    tell: Option<ProgressFn<'a>>,
    done: Cell<u64>,
    total: u64,
}

impl<'a> Progress<'a> {
    /// At the start of `total` units of work.
    pub fn new(tell: Option<ProgressFn<'a>>, total: u64) -> Self {
        Self { tell, done: Cell::new(0), total }
    }

    /// Nobody wants to know.
    pub fn none() -> Self {
        Self::new(None, 0)
    }

    /// `units` more are done. Fails if the caller wants no more of it.
    pub fn advance(&self, units: u64) -> Result<()> {
        self.done.set(self.total.min(self.done.get() + units));
        match self.tell {
            Some(tell) if !tell(self.done.get(), self.total) => Err(Error::Cancelled),
            _ => Ok(()),
        }
    }
}
