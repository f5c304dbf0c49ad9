/** The text of one answer, token by token. A stop text ends it and is cut off; what may be the beginning of one is kept back. */
export declare class TextStream {
    private readonly decode;
    private readonly stop;
    /** The text that is final. */
    text: string;
    /** Whether a stop text has come. */
    stopped: boolean;
    private readonly ids;
    constructor(decode: (ids: number[]) => string, stop: string[]);
    /** Takes the next token; gives what became final with it. */
    push(id: number): string;
    /** Gives what was kept back: no token follows. */
    finish(): string;
    private add;
}
