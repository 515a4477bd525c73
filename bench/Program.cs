using MiniCpmNative.Bench;

switch (args)
{
    case ["tokenizer", .. var rest]:
        TokenizerBench.Run(rest);
        return 0;
    case ["attention", .. var rest]:
        AttentionBench.Run(rest);
        return 0;
    case ["pictures", .. var rest]:
        return PictureBench.Run(rest);
    default:
        Console.Error.WriteLine("bench: expected a benchmark: attention, pictures, tokenizer");
        return 2;
}
