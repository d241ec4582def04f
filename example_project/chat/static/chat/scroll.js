// Follows the end of the conversation, but only for a reader who is there.

const NEAR = 80;

export class Scroll {
  #view;
  #jump;
  #follows = true;
  #last = 0;

  constructor(view, jump) {
    this.#view = view;
    this.#jump = jump;
    view.addEventListener("scroll", () => this.#moved(), { passive: true });
    jump.addEventListener("click", () => this.toEnd());
    // Folds that open, pictures and the window's size change the height too.
    const sized = new ResizeObserver(() => this.#isFollowing() && this.#down());
    sized.observe(view.firstElementChild);
    sized.observe(view);
  }

  get #left() {
    return this.#view.scrollHeight - this.#view.scrollTop - this.#view.clientHeight;
  }

  toEnd() {
    this.#follows = true;
    this.#jump.hidden = true;
    this.#down();
  }

  /** Draw something at the end, and stay at the end if that's where the reader is. */
  keep(draw) {
    const height = this.#view.scrollHeight;
    const follows = this.#isFollowing();
    draw();
    if (follows) this.#down();
    else if (this.#view.scrollHeight > height) this.#jump.hidden = false;
  }

  /** Draw something above, and keep what is read where it is. */
  hold(draw) {
    const fromEnd = this.#view.scrollHeight - this.#view.scrollTop;
    this.#follows = false;
    draw();
    this.#view.scrollTop = this.#view.scrollHeight - fromEnd;
  }

  /** A reader who has just gone up isn't pulled back before the event tells. */
  #isFollowing() {
    const wentUp = this.#view.scrollTop < this.#last - NEAR && this.#left > NEAR;
    if (wentUp) this.#follows = false;
    return this.#follows;
  }

  #down() {
    this.#view.scrollTop = this.#view.scrollHeight;
    this.#last = this.#view.scrollTop;
  }

  #moved() {
    this.#last = this.#view.scrollTop;
    this.#follows = this.#left <= NEAR;
    if (this.#follows) this.#jump.hidden = true;
  }
}
