using MiniCpmNative.Bench;

switch (args)
{
    case ["tokenizer", .. var rest]:
        TokenizerBench.Run(rest);
        return 0;
    default:
        Console.Error.WriteLine("bench: expected a benchmark: tokenizer");
        return 2;
}
