/** The ranks of a group: who takes part, how they meet, and what is known of peers. */
package io.moe4j.ep;
