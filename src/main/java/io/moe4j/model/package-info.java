/**
 * What a Mixture-of-Experts layer is, apart from any backend: its shape, its routing rule, its
 * activation, and where its weights come from.
 */
package io.moe4j.model;
